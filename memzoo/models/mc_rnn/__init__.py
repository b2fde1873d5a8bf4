"""Memory Caching: recurrent models whose memory grows by one cached state a segment."""
