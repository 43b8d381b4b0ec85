/**
 * A process that runs the command line on request, many times one after the other: `{ id, args, env }` is answered by
 * `{ id, outcome }`. Its modules are loaded once. It ends with the process that started it.
 */
import { fileURLToPath } from 'node:url';

const program = new URL('../../dist/tools/vipsec.js', import.meta.url);
const environment = { ...process.env };
let runs = 0;
let output = { stdout: '', stderr: '' };

/** What would be written to a stream is kept. */
function keep(name) {
  process[name].write = (chunk, ...rest) => {
    output[name] += typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString('utf8');
    const done = rest.at(-1);
    if (typeof done === 'function') queueMicrotask(done);
    return true;
  };
}
keep('stdout');
keep('stderr');

async function run(args, env) {
  output = { stdout: '', stderr: '' };
  process.argv = [process.execPath, fileURLToPath(program), ...args];
  process.env = { ...environment, ...env };
  process.exitCode = undefined;
  // The file of the program is evaluated anew each time, and has finished when its import has.
  await import(`${program.href}?run=${++runs}`);
  const code = process.exitCode ?? 0;
  process.exitCode = undefined;
  process.stdout.removeAllListeners('error');
  return { code, signal: null, ...output };
}

let turn = Promise.resolve();
process.on('message', ({ id, args, env }) => {
  turn = turn
    .then(() => run(args, env))
    .catch((error) => ({ code: null, signal: null, stdout: '', stderr: `the command threw: ${error?.stack ?? error}` }))
    .then((outcome) => process.send({ id, outcome }));
});
process.on('disconnect', () => process.exit());
