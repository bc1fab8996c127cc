"""Reports for people: `prmim inspect` and pictures."""
