package testenv

import (
	"fmt"
	"os/exec"
	"runtime/debug"
)

// Build is go build with these arguments, and with the race detector if the program that
// calls it has it.
func Build(args ...string) error {
	flags := []string{"build"}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-race" && s.Value == "true" {
				flags = append(flags, "-race")
			}
		}
	}
	if out, err := exec.Command("go", append(flags, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}
