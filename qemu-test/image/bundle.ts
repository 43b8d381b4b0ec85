/**
 * Bundles the programs that run inside the guest from the built package: a process of ours reads a few files instead of two hundred, each
 * of which costs an emulated machine some 30 ms. A program is where it is in the package, and every module goes on to believe that it is
 * where it was, so that it finds what it looks for by its own place. What several programs share is in `chunks/`. Dependencies stay as they are.
 */
import { readdir } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { pathToFileURL } from 'node:url';
import { rolldown } from 'rolldown';

/** Programs, below the folder of the built package: the files themselves, and all files of folders. */
export const PROGRAMS = ['tools/vipsec.js'] as const;
export const FOLDERS = [
  'tools/commands',
  'qemu-test/bodies',
  'qemu-test/guest',
  'qemu-test/ipsec',
  'qemu-test/scenarios',
] as const;
const OWN_PLACE = 'import.meta';
/** As the bundler writes it: a line of its own. Any other stays an import. */
const NODE_IMPORT = /^import (\{.*?\}|[\w$]+|\* as [\w$]+) from ("node:[\w/]+");$/gm;
/** Loaded by `require`, or only when they are needed. */
const EXTERNAL = [/^koffi$/, /^ffi-rs$/, /^@noble\//];

/** Writes the bundled programs of the package in `dist` to the folder `output`, whose content will be in `guestDist`. */
export async function bundlePrograms(dist: string, output: string, guestDist: string): Promise<void> {
  const programs: string[] = [...PROGRAMS];
  for (const folder of FOLDERS) {
    for (const name of await readdir(join(dist, folder))) if (name.endsWith('.js')) programs.push(join(folder, name));
  }
  const bundle = await rolldown({
    input: Object.fromEntries(programs.map((path) => [path.slice(0, -'.js'.length), join(dist, path)])),
    platform: 'node',
    external: EXTERNAL,
    preserveEntrySignatures: 'allow-extension',
    // Any other remark is an error; that a busy machine takes long is none.
    checks: { bundlerTimings: false },
    plugins: [
      {
        name: 'own-place',
        transform(code, id) {
          const url = pathToFileURL(join(guestDist, relative(dist, id))).href;
          return code.includes(OWN_PLACE) ? code.replaceAll(OWN_PLACE, `(${JSON.stringify({ url })})`) : null;
        },
      },
      { name: 'built-ins', renderChunk: (code) => takeBuiltins(code) },
    ],
    onLog: (_, log) => {
      throw new Error(log.message);
    },
  });
  try {
    await bundle.write({ dir: output, entryFileNames: '[name].js', chunkFileNames: 'chunks/[name].js' });
  } finally {
    await bundle.close();
  }
}

/**
 * Has Node's own modules taken as they are: an import makes a module of each first, with a binding for every name, which costs an emulated
 * process 0.3 s of the 2 that it takes to start.
 */
function takeBuiltins(code: string): string {
  return code.replace(NODE_IMPORT, (_, names: string, module: string) => {
    const pattern = names.replace('* as ', '').replaceAll(' as ', ': ');
    return `const ${pattern} = process.getBuiltinModule(${module});`;
  });
}
