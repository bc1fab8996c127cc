"""Reports: `prmim inspect`, `prmim stats`, recipes and pictures."""
