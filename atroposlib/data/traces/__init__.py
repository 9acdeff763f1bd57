"""Runtime traces: sessions of student and teacher as the runtime exports them, and the rows that are made of them."""
