"""What a run would cost this hospital, before anything is trained."""
