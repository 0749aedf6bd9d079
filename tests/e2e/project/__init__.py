"""An application of a user's, with its migrations; tests copy it to where it runs."""
