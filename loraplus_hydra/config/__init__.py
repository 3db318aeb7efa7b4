"""The schema of the config, and the names that a config uses: dotted paths, locations, hashes."""
