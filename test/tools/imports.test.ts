import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';

const root = new URL('../../', import.meta.url).pathname;

/** What a user of the package can import: the driver, the software device, and the conformance suite; and the errors that all three export. */
const PUBLIC = ['src/index.ts', 'src/device/index.ts', 'src/conform/index.ts', 'src/errors.ts'];

/** Names that `src/index.ts` exports, with the file below `src` that has each: a command that needs little need not load the rest. */
function publicNames(): Set<string> {
  const index = readFileSync(join(root, 'src/index.ts'), 'utf8');
  const exported = [...index.matchAll(/export (?:type )?\{([^}]*)\} from '\.\/([^']+)'/g)];
  return new Set(exported.flatMap(([, names, file]) => namesOf(names).map((name) => `${name} of src/${file}`)));
}

const namesOf = (list: string) =>
  list
    .split(',')
    .map((name) => name.trim().replace(/^type /, ''))
    .filter((name) => name !== '');

/** `import { names } from 'path'`, or an import of another form, which has no names. */
const IMPORT = /(?:\{([^{}]*)\}\s*from|from|import\()\s*'((?:\.\.\/)+src\/[^']+)'/g;

test('the command line is built on the public API of the package only', () => {
  const files = readdirSync(join(root, 'tools'), { recursive: true, encoding: 'utf8' }).filter((name) =>
    name.endsWith('.ts'),
  );
  expect(files.length).toBeGreaterThan(10);
  const exported = publicNames();
  expect(exported).toContain('bindFunction of src/vfio/bind.ts');
  for (const file of files) {
    const source = readFileSync(join(root, 'tools', file), 'utf8');
    for (const [, names = '', path] of source.matchAll(IMPORT)) {
      const target = path.replaceAll('../', '');
      if (PUBLIC.includes(target)) continue;
      expect(namesOf(names), `tools/${file} imports ${path}`).not.toEqual([]);
      for (const name of namesOf(names)) expect(exported, `tools/${file}`).toContain(`${name} of ${target}`);
    }
  }
});
