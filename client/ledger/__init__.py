"""What was spent: events of patients, for ever, composed; its files, receipts and recovery."""
