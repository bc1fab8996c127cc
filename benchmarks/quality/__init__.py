"""Study of accuracy: arms trained with several seeds, their records and tables."""
