"""From text to activations: the only door to Hugging Face models and text; knows no loss."""
