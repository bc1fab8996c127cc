"""The options of a run: records, layers of YAML files, and packaged recipes."""
