"""An OpenAI-compatible endpoint and a chat page over a run's checkpoint."""
