import { interopScenario } from '../bodies/interop.ts';

export const scenario = interopScenario({ part: 'integrity', where: 'inline' });
