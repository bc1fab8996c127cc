"""Readers of image formats: one module for each, which finds the images and returns their content by index."""
