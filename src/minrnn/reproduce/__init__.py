"""The paper's experiments, and a report that sets its numbers beside ours."""
