"""Fine-tuning of any model: a loop that can be killed at any moment and goes on exactly."""

from torchzoo._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "loop": ["finetune"],
        "recipe": ["Recipe", "Run", "Task", "classification", "logits_of"],
    },
    submodules=["checkpoints"],
)
