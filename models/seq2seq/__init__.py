"""Encoder-decoder language models of T5's family: pre-training, answers to prompts, and fine-tuning with freezing."""
