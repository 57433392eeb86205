"""A model of one's own beside ditas-export, and the family that serves it."""
