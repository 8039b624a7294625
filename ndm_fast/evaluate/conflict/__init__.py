"""Context against knowledge."""
