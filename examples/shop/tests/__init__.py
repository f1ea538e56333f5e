"""The shop's tests, as its authors would write them with the testing kit."""
