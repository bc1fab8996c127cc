"""The commands of `prmim`, their options and their messages."""
