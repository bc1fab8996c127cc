"""Images: sources, decoding, crops, augmentation and batches."""
