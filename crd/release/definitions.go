package release

import (
	"context"
	"fmt"
	"io/fs"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

// ApplyDefinitions brings the CustomResourceDefinitions in files, one in each, to the state that they have there.
func (r Release) ApplyDefinitions(ctx context.Context, files fs.FS) error {
	names, err := fs.Glob(files, "*.yaml")
	if err != nil {
		return err
	}
	for _, name := range names {
		content, err := fs.ReadFile(files, name)
		if err != nil {
			return err
		}
		definition := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(content, &definition.Object); err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		err = r.Client.Apply(ctx, client.ApplyConfigurationFromUnstructured(definition), client.FieldOwner("k8slan"), client.ForceOwnership)
		if err != nil {
			return fmt.Errorf("apply CRD %s: %w", definition.GetName(), err)
		}
		r.Log.Info("CRD is up to date", "crd", definition.GetName())
	}
	return nil
}
