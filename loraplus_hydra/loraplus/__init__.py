"""The method: role, rule, group, optimizer and schedule. Needs torch and PEFT only."""
