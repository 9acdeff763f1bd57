"""Control of one inference server: who it is, pause, resume, versions. One module an engine."""
