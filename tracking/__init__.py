"""What happened: the flight recorder, the journal, and the delivery of both to a tracking server."""
