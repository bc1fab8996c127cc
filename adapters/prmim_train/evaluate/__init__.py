"""Evaluation of a trained encoder: frozen features and trained classifiers."""
