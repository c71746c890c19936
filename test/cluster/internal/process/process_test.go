package process

import (
	"context"
	"errors"
	"io/fs"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestStatOfAProcessWithAnUnusualName(t *testing.T) {
	state, start, err := parseStat("77 (a) S (b) R 1 77 77 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 2 3\n")
	if err != nil || state != "R" || start != 987654 {
		t.Errorf("state %q, start %d, error %v; want R, 987654", state, start, err)
	}
}

func TestARecordOutlivesItsProcessWithoutTakingAnotherForIt(t *testing.T) {
	sleep := exec.Command("sleep", "60")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer sleep.Process.Kill()
	r, err := Identify(sleep.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "record")
	if err := r.Save(path); err != nil {
		t.Fatal(err)
	}
	loaded, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if alive, err := loaded.Alive(); err != nil || !alive {
		t.Fatalf("running: alive %v, error %v", alive, err)
	}

	another := loaded
	another.Start++ // the same number, started at another time
	if err := another.Stop(context.Background(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if alive, err := loaded.Alive(); err != nil || !alive {
		t.Fatalf("after another process's record was stopped: alive %v, error %v", alive, err)
	}

	if err := loaded.Stop(context.Background(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// Not waited for yet: its number is still taken.
	if alive, err := loaded.Alive(); err != nil || alive {
		t.Fatalf("stopped: alive %v, error %v", alive, err)
	}
	_ = sleep.Wait() // killed, which it says
	if _, err := Identify(r.PID); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a process that has ended is identified with error %v, want not-exist", err)
	}
}
