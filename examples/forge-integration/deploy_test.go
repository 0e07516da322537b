package main

import (
	"testing"

	"github.com/solstice-ci/solstice-go/internal/deploytest" //nolint:depguard // the test is not part of the main that is copied
)

// TestDeploy: the files to deploy by are true to this program.
func TestDeploy(t *testing.T) {
	known := deploytest.Variables(t, new(flags), "solstice-forge-integration")
	if _, ok := known["RETAIN_DELIVERIES"]; !ok || len(known) < 30 {
		t.Fatalf("the program's variables: %v", known)
	}
	deploytest.Documented(t, "forge-integration.env.example", known)
	deploytest.Unit(t, "solstice-forge-integration.service", known)
	deploytest.ReadCompose(t).Services["forge-integration"].Known(t, "forge-integration", known)
}
