"""People and sockets: sessions on the media clock, viewers, destinations, agents. Knows runtime.engine only."""
