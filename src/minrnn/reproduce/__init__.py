"""The evidence: every experiment of the paper behind one command, with a report that sets its numbers beside ours."""
