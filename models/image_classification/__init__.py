"""Image classification: networks of transformers, trained from a folder of images or from a prepared store."""
