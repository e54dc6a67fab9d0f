"""One of several processes of a test: runs stages in turn and notes which rows it read. Arguments: a JSON of what to do."""

import json
import os
import signal
import sys
import zlib

import numpy as np

from experiments import common
from jaxllm import cluster, exits, launch

make_loader = common.make_loader


def rows_of(batch):
    """A number for every row of a batch."""
    tokens = batch["tokens"] if "tokens" in batch else batch["chosen"]["tokens"]
    return [zlib.crc32(np.ascontiguousarray(row)) for row in tokens]


def recording(path, stop_at=None):
    """make_loader whose batches are noted in a file, and which asks for a stop as a scheduler does."""

    def make(columns, *args, **options):
        loader = make_loader(columns, *args, **options)

        def batch(step):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            found = loader.batch(step)
            with open(path, "a") as file:
                file.write(json.dumps([step, rows_of(found)]) + "\n")
            return found

        return loader._replace(batch=batch) if hasattr(loader, "_replace") else type(loader)(loader.size, batch, loader.state)

    return make


def main():
    told, index = json.loads(sys.argv[1]), int(sys.argv[2])
    os.environ.update(cluster.flag_environment(told["coordinator"], told["processes"], index))
    os.environ.update(told.get("environment", {}).get(str(index), {}))

    def work():
        launch.prepare_jax()
        stop_at = told.get("stop_at", {}).get(str(index))
        common.make_loader = recording(f"{told['notes']}.{index}", stop_at)
        for name, workdir, overrides in told["stages"]:
            stage = __import__(f"experiments.{name}", fromlist=["main"])
            launch.start(stage.main, name, {**overrides, **told.get("own", {}).get(str(index), {})}, workdir)

    launch._exit(exits.guard(work, None, "the same command"))


if __name__ == "__main__":
    main()
