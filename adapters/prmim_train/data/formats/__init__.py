"""Readers of image formats, one module for each.

A reader finds the images and returns their content by index.
"""
