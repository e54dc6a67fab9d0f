"""The life cycle on one machine: tokenizer, pretraining, SFT, reward model, DPO, PPO, evaluation and report."""
