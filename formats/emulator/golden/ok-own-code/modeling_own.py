# its own class
