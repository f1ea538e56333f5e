"""What is left to a driver, because SQLAlchemy would take longer: arrays, and hot loops."""
