"""Fine-tuning a LoRA adapter on the frozen, quantised base model."""
