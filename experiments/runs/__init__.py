"""What a run is and what it leaves behind: frozen config, directory, records."""
