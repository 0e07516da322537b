package solstice

import (
	"testing"
	"time"
)

// TestMeasuringMayHang: whoever asks whether there is room gets the last answer
// while a file system does not answer.
func TestMeasuringMayHang(t *testing.T) {
	s := newSpace(Space{Dirs: []string{"away"}}, time.Second)
	s.free = func(string) (int64, error) {
		if !s.mu.TryLock() {
			t.Fatal("whoever asks has to wait")
		}
		s.mu.Unlock()
		if err := s.err(); err != nil {
			t.Error(err)
		}
		return 0, nil
	}
	if _, changed, _ := s.look(); !changed || s.err() == nil {
		t.Error("there is room")
	}
}
