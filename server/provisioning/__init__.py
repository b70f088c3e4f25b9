"""What an operator sets up: folder, certificates, roster, enrolment files, checks, backups."""
