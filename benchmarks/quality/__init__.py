"""What throwing tokens does to the representation: arms of one training, evaluated alike, with several seeds."""
