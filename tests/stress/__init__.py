"""A million commits and a doorbell: no commit waits for longer than it may."""
