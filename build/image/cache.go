package image

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Cached returns the path of img's archive in dir, and writes it if no archive
// made from the same inputs is there.
func (img Image) Cached(ctx context.Context, dir string) (string, error) {
	key, err := img.key()
	if err != nil {
		return "", err
	}
	name, _, _ := strings.Cut(path.Base(img.Name), ":")
	archive := filepath.Join(dir, name+"-"+key+".tar")
	_, err = os.Stat(archive)
	if errors.Is(err, fs.ErrNotExist) {
		return archive, img.Write(ctx, archive)
	}
	if err != nil {
		return "", fmt.Errorf("look for the archive of image %s: %w", img.Name, err)
	}
	return archive, nil
}

// key is a hash of all that decides what img's archive holds.
func (img Image) key() (string, error) {
	files, err := Tree(img.Files)
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	for i := range files {
		data, err := files[i].Read()
		if err != nil {
			return "", err
		}
		sum := sha256.Sum256(data)
		files[i].From, files[i].Data = "", sum[:]
	}
	img.Files = files
	if err := json.NewEncoder(hash).Encode(img); err != nil {
		return "", fmt.Errorf("hash image %s: %w", img.Name, err)
	}
	return fmt.Sprintf("%x", hash.Sum(nil)[:8]), nil
}
