"""The transports: three protocols, and one package for each back end."""
