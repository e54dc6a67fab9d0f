"""Pretraining on next tokens. Variants are the model presets: configs/pretrain.py:gpt2, :llama3.2-1b, ..., and :1b and :8b."""

from configs.common import model_settings, text_data, training
from jaxllm.models.presets import preset

# the architectures of Llama 3.2 1B and 3.1 8B at lengths and batches for 16 v5e and 64 v5p chips (see experiments.plan)
SIZED = {"1b": ("llama3.2-1b", 2048, 32), "8b": ("llama3.1-8b", 4096, 64)}


def get_config(variant=None):
    c = training(steps=600, batch_size=32, lr=3e-3, eval_every=200)
    c.optim.warmup = 20
    name, length, batch_size = SIZED.get(variant, (variant or "tiny", None, 256))
    model = preset(name)
    text_data(c, length=length or (64 if variant is None else model.max_length), vocab_size=model.vocab_size)
    c.model = model_settings(model)
    if variant is not None:
        c.optim.lr, c.optim.warmup, c.steps, c.batch_size, c.log_every = 3e-4, 2000, 100_000, batch_size, 100
    return c
