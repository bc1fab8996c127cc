"""Import and export of weights, and upload to the Hugging Face hub."""
