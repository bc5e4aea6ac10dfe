# the base's own configuration
