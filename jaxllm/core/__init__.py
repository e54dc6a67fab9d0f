"""What every folder of jaxllm may import: types, parameter specs, tree paths, sharding and the vocabulary operations."""
