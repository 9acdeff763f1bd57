"""What the old Atropos routes need beside the store: their messages, their arithmetic, their rules of delivery."""
