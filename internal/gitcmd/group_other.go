//go:build !unix

package gitcmd

import "os/exec"

// ownGroup does nothing where there are no process groups: only git itself is
// killed then.
func ownGroup(*exec.Cmd) {}
