package daemon

import (
	"reflect"
	"testing"
)

func TestEnvironmentPassesOnlyWhatIsNamed(t *testing.T) {
	t.Setenv("SOLTEST_A", "1")
	t.Setenv("SOLTEST_B", "x=y")
	t.Setenv("SOLTES", "no")
	if got, want := Environment("SOLTEST_*"), map[string]string{"SOLTEST_A": "1", "SOLTEST_B": "x=y"}; !reflect.DeepEqual(got, want) {
		t.Errorf("by pattern: %v, want %v", got, want)
	}
	if got, want := Environment("SOLTEST_B", "SOLTEST_ABSENT"), map[string]string{"SOLTEST_B": "x=y"}; !reflect.DeepEqual(got, want) {
		t.Errorf("by name: %v, want %v", got, want)
	}
	if got := Environment(); len(got) != 0 {
		t.Errorf("by nothing: %v", got)
	}
}
